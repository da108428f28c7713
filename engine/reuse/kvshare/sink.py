"""What stands in front of a text that is compiled alone.

A sequence's first tokens draw attention that means nothing, and the rest is computed around it. Line breaks in that place leave
the KV of the text unlike any that it gets in a prompt; ordinary prose leaves it close (docs/kvshare.md has the figures). The
prose is the same for everybody, says nothing, and its own KV is thrown away.
"""

PROSE = """\
The pages that follow were collected over many years and by many hands. Some are short notes, some are long descriptions, and
some are only lists that somebody once found useful. They can be read in any order. Nothing on one page depends on what was said
on the page before, and nobody is expected to read all of them. A reader who looks for something will usually find it faster by
turning a few pages than by starting at the beginning, and whoever has found it can put the book back on the shelf.

It is a quiet afternoon. Outside there are trees along a street, a few cars, and people who walk home with their shopping.
Inside there is a table with a lamp, a chair, and a window that is open a little. The weather has been good this week, neither
warm nor cold, and there is no reason to hurry. Work that was begun in the morning is nearly done, and what is left can wait
until tomorrow. There is time to sit down, to take one page after another, and to see what is written there. What comes next is
one of these pages.
It is given here in full, as it was written, and it stands for itself.

"""
