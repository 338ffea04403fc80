"""A multirun sweep (`-m`): every member in a process of its own, wherever Hydra's launcher has it run."""
