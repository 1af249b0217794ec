"""Forward process and samplers: everything between a network's output and x0, in float32 or wider."""
