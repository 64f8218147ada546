"""Speed, memory and quality of fastlora beside loralib, PEFT and the frozen layer."""
