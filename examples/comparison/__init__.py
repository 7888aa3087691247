"""What both comparisons share: methods, sizes, search, training, report."""
