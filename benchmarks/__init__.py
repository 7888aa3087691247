"""What was measured, and by which programs."""
