"""A whole environment: endless tasks with a gold trajectory, a tool, and the function that judges."""

from agentopd_envs import ToolEnvironment, register_environment, tool, tool_turn


@register_environment("thermostat")
class Thermostat(ToolEnvironment):
    @classmethod
    def generate(cls, rng):
        now, goal = rng.sample(range(10, 31), 2)
        gold = [tool_turn("change", by=goal - now), "Done."]
        return cls.new_task(f"Go from {now} to {goal} degrees.", public={"now": now}, hidden={"goal": goal}, gold=gold)

    def setup(self):
        self.degrees = self.task.public["now"]

    @tool(mutates=True)
    def change(self, by: int):
        """Change the temperature. Args: by: degrees, negative to cool."""
        self.degrees += by
        return self.degrees

    @staticmethod
    def score(task, episode):
        return float(episode.final_state["degrees"] == task.hidden["goal"])
