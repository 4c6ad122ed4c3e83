"""The templates that ship; every module of this folder has those of a family of tasks."""
