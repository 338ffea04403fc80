"""The model: its sizes and weights in numpy (spec), and two twins that compute it (torch_gpt, mlx_gpt)."""
