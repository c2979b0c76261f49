"""One small module a hypothesis: it measures, and knows no threshold."""
