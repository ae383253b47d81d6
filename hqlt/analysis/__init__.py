"""Looking into trained models, and reports for people."""
