"""Speed, memory and energy, ours beside stock: cases to measure, one process per run, rows made of the runs."""
