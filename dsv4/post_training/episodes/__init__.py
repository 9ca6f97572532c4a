"""Long episodes: many turns with tools, sampled by the engine, trained as one sample each."""
