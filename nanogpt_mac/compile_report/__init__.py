"""How the compile report sees: what Dynamo and Inductor made, recorded while it runs, and the suspects in it."""
