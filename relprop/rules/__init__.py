"""The propagation rules, one file for each sort of layer."""
