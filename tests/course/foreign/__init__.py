"""Answers, wrong and right, by people who saw the tasks and neither the grader nor its known mistakes."""
