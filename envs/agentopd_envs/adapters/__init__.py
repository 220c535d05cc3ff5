"""What plugs other people's data sets and environments into AgentOPD, and AgentOPD's environments into their tools."""
