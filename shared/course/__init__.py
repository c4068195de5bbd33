"""Week 0. The course's own tooling: workspaces, exercises, reports, the progress page."""
