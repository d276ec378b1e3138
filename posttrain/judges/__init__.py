"""Models that judge answers, through an OpenAI-compatible URL: asked within bounds, cached by content, their tokens counted.

client.py    one request: tries, time limits, errors in words
store.py     replies on disk, by the hash of the question
judge.py     many requests at once, and usage
verdicts.py  prompts for two answers in both orders, or for one score of each answer
marks.py     verdicts and grades in double brackets, also in the replies to judges as rewards
"""

from posttrain.judges.client import API_KEY, URL, ChatClient, Reply
from posttrain.judges.judge import Judge, Usage
from posttrain.judges.verdicts import Rubric, Verdict, compare, grade

__all__ = ["API_KEY", "URL", "ChatClient", "Judge", "Reply", "Rubric", "Usage", "Verdict", "compare", "grade"]
