"""One query refinement layer and its parts."""
