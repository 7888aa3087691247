"""What every comparison of adaptation methods shares, whatever the task: methods, search, training, report."""
