"""`scripts/bench`: what the gateway costs, measured on servers of its own. The README here says what each is."""
