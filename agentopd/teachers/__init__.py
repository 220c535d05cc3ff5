"""Teachers: they score the very tokens the student wrote."""
