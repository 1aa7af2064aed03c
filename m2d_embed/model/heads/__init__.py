"""What sits on top of the encoder: tagging (AudioSet labels) and the audio-text projections of M2D-CLAP."""
