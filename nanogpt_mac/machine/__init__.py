"""What the machine is and what it can do: chips and their peaks, facts about this machine, energy, measured matmuls."""
