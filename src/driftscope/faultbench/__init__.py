"""The fault benchmark: known faults put into models and engines, and what the tool says about each."""
