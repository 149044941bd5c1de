"""Running models on a CPU, against the fastest engines there are."""
