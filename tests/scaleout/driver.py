"""A program for a network namespace of its own: judges a solved task on a Ray worker; prints verdict and namespaces."""

import asyncio
import json
import os
import sys

from agentopd.build import Judge, build_sandbox, load_skills
from agentopd.config.run import SandboxConfig, SkillConfig, SuiteConfig
from agentopd.config.scaleout import RayConfig
from agentopd.contracts import Case, Program
from agentopd.evaluate import evaluate_script, heldout_tasks
from agentopd.rendering import HermesJSON

WHERE = "__import__('os').readlink('/proc/self/ns/net')"


async def main(address: str) -> None:
    skills = load_skills(SuiteConfig(skills=(SkillConfig(name="repair", env="code_repair"),)))
    config = RayConfig(address=address, verification_workers=1, verification_resource="judge", deadline_s=120.0)
    judge = Judge(skills.values(), build_sandbox(SandboxConfig(backend="unsafe", workers=1), skills.values(), config))
    try:
        ((_, verdict),) = await evaluate_script(
            "gold", skills, heldout_tasks(skills.values(), 1, 0), judge, HermesJSON()
        )
        (found,) = await judge.sandbox.run_cases(Program(""), [Case("where", WHERE)])
    finally:
        await judge.sandbox.aclose()
    here = os.readlink("/proc/self/ns/net")
    print(json.dumps({"verdict": verdict.model_dump(mode="json"), "here": here, "there": found.value}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
