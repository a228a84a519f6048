"""The memory of this machine and of this process: what there is, what a budget buys of it, what stays in it, what caps it."""
