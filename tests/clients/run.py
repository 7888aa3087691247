"""Run LReg against real clients and write `docs/research/clients.md`: `python tests/clients/run.py [client ...]`.

Not part of the test suite: the clients are large. Install what is to be checked beside lreg_peft, for example

    pip install trl sentence-transformers lm-eval lightning bitsandbytes torchao optimum-quanto setfit
    pip install onnx onnxscript onnxruntime
    pip install --no-deps opacus opt_einsum

and DeepSpeed as the head of its script says. "fsdp" needs torch alone.

A client that is not installed is reported as such.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CLIENTS = {
    "trl": "trl",
    "sentence_transformers": "sentence-transformers",
    "lm_eval": "lm_eval",
    "lightning": "lightning",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "quanto": "optimum-quanto",
    "setfit": "setfit",
    "deepspeed": "deepspeed",
    "fsdp": "torch",
    "onnx": "onnxruntime",
    "opacus": "opacus",
}
BELOW = ("torch", "transformers", "peft", "accelerate")

TABLE = """# Checked against real clients

`python tests/clients/run.py` on {below}, on a CPU. Models of a few thousand weights, made in
the scripts; the point is that every shortcut trains, is saved and comes back.

| client | version | what | outcome | remark |
| --- | --- | --- | --- | --- |
{rows}
"""


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def below() -> str:
    found = ", ".join(f"{package} {version_of(package)}" for package in BELOW)
    return f"Python {platform.python_version()} with {found}"


def check(client: str, timeout: float) -> list[tuple[str, str, str]]:
    """`(outcome, what, remark)` of every check of one client."""
    if version_of(CLIENTS[client]) is None:
        return [("not installed", "", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, str(HERE / f"{client}_client.py")]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
        output, errors, status = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode()
        errors, status = f"no end within {timeout:.0f} s", 1
    rows = [line.split("\t")[1:4] for line in output.splitlines() if line.startswith("@\t")]
    found = [(outcome, what, remark) for outcome, what, remark in rows]
    if status and all(outcome == "pass" for outcome, _, _ in found):
        last = errors.strip().splitlines()
        found.append(("fail", "start", last[-1][:160] if last else f"exit status {status}"))
    if status:
        print(errors, file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="client", help=f"of {', '.join(CLIENTS)}; all if none is named")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per client")
    parser.add_argument(
        "--table", type=Path, default=ROOT / "docs" / "research" / "clients.md", help="where to write the table"
    )
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.clients) - set(CLIENTS)):
        parser.error(f"unknown clients {unknown}; there are {', '.join(CLIENTS)}")
    rows, failed = [], False
    for client in arguments.clients or CLIENTS:
        start = time.perf_counter()
        for outcome, what, remark in check(client, arguments.timeout):
            failed |= outcome == "fail"
            print(f"{client:22s} {outcome:14s} {what}  {remark}", flush=True)
            package = CLIENTS[client]
            rows.append(
                f"| {package} | {version_of(package) or ''} | {what} | {outcome} | {remark.replace('|', '/')} |"
            )
        print(f"{client:22s} {time.perf_counter() - start:.0f} s", flush=True)
    if not arguments.clients:
        arguments.table.write_text(TABLE.format(below=below(), rows="\n".join(rows)), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
