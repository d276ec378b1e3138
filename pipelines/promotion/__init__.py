"""From a trained model to the champion: the gate's arithmetic, its page, and the registry's aliases."""
