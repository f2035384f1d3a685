"""Surgery: a pruned model in memory, its checkpoint on disk, and the proof that stock transformers loads it."""
