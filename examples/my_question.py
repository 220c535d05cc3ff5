"""A single-turn environment: a question, its answer, and the function that compares."""

from agentopd_envs import SingleTurnEnvironment, register_environment


@register_environment("backwards")
class Backwards(SingleTurnEnvironment):
    @classmethod
    def generate(cls, rng):
        word = "".join(rng.sample("abcdefgh", 5))
        return cls.new_task(f"Write {word} backwards.", hidden={"answer": word[::-1]}, gold=[word[::-1]])

    @staticmethod
    def score(task, episode):
        return float(episode.final_text.strip() == task.hidden["answer"])
