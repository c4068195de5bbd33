"""The same for exercises that build a class or a loop. No test holds the grader to them yet."""
