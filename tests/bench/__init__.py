"""The benchmarks that ``scripts/bench`` runs; nothing here decides a test."""
