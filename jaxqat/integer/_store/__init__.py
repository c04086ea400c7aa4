"""An integer graph as a folder, and back."""
