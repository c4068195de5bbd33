"""Week 12. A server for the models of this course: an engine that writes many texts at once, and OpenAI's API
in front of it.
"""
