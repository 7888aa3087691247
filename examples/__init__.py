"""What a user reads and runs."""
