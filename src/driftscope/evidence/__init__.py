"""Evidence on disk: table schemas, validated atomic writing, provenance."""
