"""How the fallback detector sees: its child process, the profiler's pass, refusals, and the findings made of them."""
