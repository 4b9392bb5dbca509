"""Write a vision-language model with random weights as a folder: python examples/tiny_models.py FAMILY FOLDER.

The families are in the folder of this name.
"""

from tiny_models.command import main  # the folder: Python prefers it to this file

if __name__ == "__main__":
    main()
