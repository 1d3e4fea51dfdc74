"""Long and large tests, run by scripts/soak: each measures servers in processes of their own."""
