"""Fuzzing of the readers: files that were changed on purpose must open or be refused in one line."""
