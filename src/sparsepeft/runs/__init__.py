"""What a training run is made of and what it leaves in its folder."""
