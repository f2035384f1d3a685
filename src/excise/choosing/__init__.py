"""Who proposes which blocks to remove, and how the proposals are measured and compared."""
