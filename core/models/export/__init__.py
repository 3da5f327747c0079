"""Write quantised models in the formats of other programs, or say why one does not fit."""
