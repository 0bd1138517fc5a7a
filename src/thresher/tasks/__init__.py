"""From data to features to metrics, one file a task.

`data` reads rows from files, folders and the hub; `text` is classification and regression of one text or two; `corpus`
is the English text every Python carries; `questions` and `answering` are extractive question answering; `retrieval` finds
a held-out sentence's section. Import the modules themselves: what one of them needs (datasets, scikit-learn) is not
loaded for another.
"""
