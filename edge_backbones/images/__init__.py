"""Images of every kind as network input: files, camera frames, and the preprocessing that a network was trained with."""
