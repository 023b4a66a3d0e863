"""Asks a video questions: the encoded video, the frames of a question, the answer."""
