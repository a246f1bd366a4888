"""Steps, grading and rewards."""
