"""How the embedded models were trained and are judged: run from a clone, not installed."""
