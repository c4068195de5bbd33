"""Week 0. How data flows through what the course builds: pictures with shapes on the arrows.

python -m shared.course.pictures
"""
