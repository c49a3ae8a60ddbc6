"""Load backbones: `load` chooses a loader, the other modules load one kind of source each or help with it."""
