"""Labelled data: tables, folders, folds, events."""
