"""The report: evidence in, one JSON document and one page out."""
